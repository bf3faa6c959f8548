"""The soup's folder, its card and its pictures, and the way to the Hub."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_soup.publishing.adapter import write_adapter_files as write_adapter_files
    from hf_soup.publishing.folder import (
        resolve_recipe as resolve_recipe,
        soup_report as soup_report,
        write_folder as write_folder,
    )
    from hf_soup.publishing.merged_models import MergedModels as MergedModels
    from hf_soup.publishing.soup import Soup as Soup
else:
    from hf_soup._util.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__)
