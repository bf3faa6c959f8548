"""Data, tasks and metrics; scores of models, candidates and soups; what methods collect on examples."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_soup.evaluation.batch_norm import (
        BOUND as BOUND,
        MEAN as MEAN,
        VARIANCE as VARIANCE,
        batch_norms as batch_norms,
        looks_at_calibration as looks_at_calibration,
        running_statistics as running_statistics,
    )
    from hf_soup.evaluation.batch_statistics import recalibrate_batch_norm as recalibrate_batch_norm
    from hf_soup.evaluation.candidates import Candidates as Candidates
    from hf_soup.evaluation.classification import ClassificationDataset as ClassificationDataset
    from hf_soup.evaluation.collection import (
        collect_statistics as collect_statistics,
        statistics_notes as statistics_notes,
        with_statistics as with_statistics,
    )
    from hf_soup.evaluation.data import loader_of as loader_of
    from hf_soup.evaluation.dataset import (
        EvalDataset as EvalDataset,
        LearnableDataset as LearnableDataset,
        MeanOfRows as MeanOfRows,
        answered_together as answered_together,
    )
    from hf_soup.evaluation.encoded_rows import EncodedRows as EncodedRows
    from hf_soup.evaluation.evaluation_data import (
        Calibration as Calibration,
        EvaluationData as EvaluationData,
        data_of_soup as data_of_soup,
        load_calibration as load_calibration,
        load_data as load_data,
        looks_at_examples as looks_at_examples,
        require_rows as require_rows,
        require_variance as require_variance,
    )
    from hf_soup.evaluation.memory import require_memory as require_memory
    from hf_soup.evaluation.model import build_model as build_model
    from hf_soup.evaluation.model_answers import SavedModel as SavedModel, answer_along as answer_along
    from hf_soup.evaluation.preprocessing import prepare_datasets as prepare_datasets
    from hf_soup.evaluation.report import LAST as LAST, SOUP as SOUP, EvaluationReport as EvaluationReport
    from hf_soup.evaluation.search import Choice as Choice, MixtureSpace as MixtureSpace, choose as choose
    from hf_soup.evaluation.tasks import task_named as task_named
    from hf_soup.evaluation.tasks.task import (
        PreparedRows as PreparedRows,
        Task as Task,
        donors_tokenizer as donors_tokenizer,
    )
    from hf_soup.evaluation.template import (
        ModelTemplate as ModelTemplate,
        model_template as model_template,
        scored_with as scored_with,
    )
else:
    from hf_soup._util.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__)
