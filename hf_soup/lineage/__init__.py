"""May these models be averaged? Which tensor is which, what the weights have in common, and the verdict."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_soup.lineage.aligned_model import AlignedModel as AlignedModel
    from hf_soup.lineage.alignment import AlignedModels as AlignedModels, AlignmentOptions as AlignmentOptions
    from hf_soup.lineage.assets import (
        about_files as about_files,
        soup_config as soup_config,
        write_assets as write_assets,
        write_files_beside as write_files_beside,
    )
    from hf_soup.lineage.base import with_base as with_base
    from hf_soup.lineage.compatibility import processing_files as processing_files
    from hf_soup.lineage.declared_bases import BaseReference as BaseReference
    from hf_soup.lineage.report import (
        LineageReport as LineageReport,
        check_lineage as check_lineage,
        correspond as correspond,
    )
else:
    from hf_soup._util.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__)
