"""Data, tasks and metrics; scores of models, candidates and soups; what methods collect on examples."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_soup.evaluation.batch_norm import (
        BOUND as BOUND,
        MEAN as MEAN,
        VARIANCE as VARIANCE,
        batch_norms as batch_norms,
        require_looked_at as require_looked_at,
        running_statistics as running_statistics,
    )
    from hf_soup.evaluation.batch_statistics import BatchStatistics as BatchStatistics
    from hf_soup.evaluation.calibration import (
        prepare_calibration as prepare_calibration,
        recalibrate_batch_norm as recalibrate_batch_norm,
        statistics_for as statistics_for,
        statistics_notes as statistics_notes,
    )
    from hf_soup.evaluation.calibration_data import CalibrationDataset as CalibrationDataset
    from hf_soup.evaluation.candidates import answer_along as answer_along
    from hf_soup.evaluation.collection import (
        collect_coefficients as collect_coefficients,
        collect_statistics as collect_statistics,
    )
    from hf_soup.evaluation.data import loader_of as loader_of
    from hf_soup.evaluation.dataset import (
        EvalDataset as EvalDataset,
        notes_of as notes_of,
        prepare_datasets as prepare_datasets,
    )
    from hf_soup.evaluation.model import require_device as require_device
    from hf_soup.evaluation.report import (
        LAST as LAST,
        SOUP as SOUP,
        Evaluation as Evaluation,
        EvaluationReport as EvaluationReport,
        require_memory as require_memory,
        scored_with as scored_with,
    )
    from hf_soup.evaluation.search import (
        Choice as Choice,
        choose as choose,
    )
    from hf_soup.evaluation.statistics import Comparison as Comparison
else:
    from hf_soup._util.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__)
