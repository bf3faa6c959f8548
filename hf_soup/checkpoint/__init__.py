"""One pinned model: its files and tensors, config, labels, parameters, tokenizer, processor. No weights in memory."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_soup.checkpoint.adapter import (
        ADAPTER_FOLDER as ADAPTER_FOLDER,
        ADAPTER_SETTINGS as ADAPTER_SETTINGS,
        ADAPTER_WEIGHTS as ADAPTER_WEIGHTS,
        PEFT_PREFIX as PEFT_PREFIX,
        AdapterBase as AdapterBase,
        files_beside as files_beside,
    )
    from hf_soup.checkpoint.checkpoint import (
        Checkpoint as Checkpoint,
        distinct_names as distinct_names,
        require_unchanged as require_unchanged,
    )
    from hf_soup.checkpoint.config import (
        PIPELINES as PIPELINES,
        ConfigDifference as ConfigDifference,
        is_quantised as is_quantised,
        model_class as model_class,
        output_dtype_config as output_dtype_config,
        pipeline_tasks as pipeline_tasks,
        read_config as read_config,
        same_architecture as same_architecture,
        ties_embeddings as ties_embeddings,
    )
    from hf_soup.checkpoint.file_sources import (
        FileSource as FileSource,
        HubRepo as HubRepo,
        LocalFolder as LocalFolder,
        fetch_files as fetch_files,
    )
    from hf_soup.checkpoint.headers import (
        COUNT as COUNT,
        DTYPES as DTYPES,
        FLOATS as FLOATS,
        ITEM_BYTES as ITEM_BYTES,
        Factor as Factor,
        LowRankUpdate as LowRankUpdate,
        Read as Read,
        RowRange as RowRange,
        TensorInfo as TensorInfo,
        front_matter as front_matter,
        read_header as read_header,
        read_json as read_json,
        reader_of as reader_of,
    )
    from hf_soup.checkpoint.labels import (
        TIMM as TIMM,
        label_names as label_names,
        label_order as label_order,
        labels_differ as labels_differ,
        num_labels as num_labels,
        with_labels as with_labels,
    )
    from hf_soup.checkpoint.memo import remembered as remembered
    from hf_soup.checkpoint.opening import (
        adapter_base as adapter_base,
        open_all as open_all,
        open_checkpoint as open_checkpoint,
    )
    from hf_soup.checkpoint.parameters import (
        Correspondence as Correspondence,
        body_config as body_config,
        contradictions as contradictions,
        correspondence as correspondence,
        counted_names as counted_names,
        head_tensors as head_tensors,
        label_rows as label_rows,
        names_outputs as names_outputs,
        parts_of as parts_of,
    )
    from hf_soup.checkpoint.processor import (
        ProcessorDifference as ProcessorDifference,
        Tokens as Tokens,
        same_processing as same_processing,
        token_ids as token_ids,
    )
    from hf_soup.checkpoint.processor_bounds import Kind as Kind, excess as excess, panics_as_errors as panics_as_errors
    from hf_soup.checkpoint.sampling import (
        BODY_TENSORS as BODY_TENSORS,
        HEAD_TENSORS as HEAD_TENSORS,
        Array as Array,
        RowSample as RowSample,
        choose_rows as choose_rows,
        read_samples as read_samples,
    )
    from hf_soup.checkpoint.sentence_modules import (
        described_modules as described_modules,
        stated_modules as stated_modules,
    )
    from hf_soup.checkpoint.tensor_sources import TensorSource as TensorSource
    from hf_soup.checkpoint.tensors import (
        TORCH as TORCH,
        bytes_of as bytes_of,
        keep_freed as keep_freed,
        widened as widened,
    )
else:
    from hf_soup._util.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__)
