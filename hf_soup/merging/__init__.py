"""Weights from weights: layout, arithmetic, engine, processes; to files, and to memory for candidates."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_soup.merging.adapter_plan import AdapterPlan as AdapterPlan
    from hf_soup.merging.arithmetic import (
        uniform as uniform,
    )
    from hf_soup.merging.context import RunContext as RunContext
    from hf_soup.merging.cutoffs import needs_cutoffs as needs_cutoffs
    from hf_soup.merging.digest import digest_of as digest_of, digest_of_folder as digest_of_folder, root_of as root_of
    from hf_soup.merging.engine import Reading as Reading
    from hf_soup.merging.layout import (
        BLOCK_BYTES as BLOCK_BYTES,
        Layout as Layout,
        OutputTensor as OutputTensor,
    )
    from hf_soup.merging.low_rank import PRODUCT_BOUND as PRODUCT_BOUND
    from hf_soup.merging.plan import Plan as Plan
    from hf_soup.merging.processes import (
        ProcessGroup as ProcessGroup,
        close_all as close_all,
        in_step as in_step,
        require_alone as require_alone,
    )
    from hf_soup.merging.statistics_store import (
        MAX_STATISTICS_BYTES as MAX_STATISTICS_BYTES,
        StatisticsStore as StatisticsStore,
        needs_statistics as needs_statistics,
        statistics_folder as statistics_folder,
        statistics_kind as statistics_kind,
        statistics_path as statistics_path,
    )
    from hf_soup.merging.to_adapter import merge_adapter as merge_adapter
    from hf_soup.merging.to_files import (
        MergeResult as MergeResult,
        merge as merge,
        merge_along as merge_along,
    )
    from hf_soup.merging.to_memory import Materializer as Materializer
    from hf_soup.merging.weight_files import (
        fetch_small as fetch_small,
        fetch_weights as fetch_weights,
        missing_weights as missing_weights,
        weight_files_of as weight_files_of,
    )
    from hf_soup.merging.workspace import Workspace as Workspace, refuse_existing as refuse_existing
else:
    from hf_soup._util.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__)
