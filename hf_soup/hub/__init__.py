"""The Hugging Face Hub, read and written. The only importer of huggingface_hub."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_soup.hub.cache import keep_note as keep_note, own_cache_folder as own_cache_folder, read_note as read_note
    from hf_soup.hub.client import (
        Token as Token,
        cut_off as cut_off,
        may_pass as may_pass,
        patient as patient,
        without_bars as without_bars,
    )
    from hf_soup.hub.download import (
        cache_folder as cache_folder,
        cached_path as cached_path,
        download_beside as download_beside,
        fetch_one as fetch_one,
        read_range as read_range,
        traffic as traffic,
    )
    from hf_soup.hub.file_digests import (
        FileHasher as FileHasher,
        Stamp as Stamp,
        changed_while_read as changed_while_read,
        is_intact as is_intact,
        keeping as keeping,
        known_sha256 as known_sha256,
        prune as prune,
        remember_sha256 as remember_sha256,
        sha256_of as sha256_of,
        stamp_of as stamp_of,
    )
    from hf_soup.hub.push import (
        PushResult as PushResult,
        commit_folder as commit_folder,
        inspect_target as inspect_target,
        require_public as require_public,
    )
    from hf_soup.hub.repo import (
        Listed as Listed,
        Repo as Repo,
        base_models as base_models,
        conversion_of as conversion_of,
        is_reachable as is_reachable,
        is_repo_id as is_repo_id,
        remember_commit as remember_commit,
        resolve as resolve,
        resolve_dataset as resolve_dataset,
        search_models as search_models,
        within_repo as within_repo,
    )
    from hf_soup.hub.repo_files import (
        ASSETS as ASSETS,
        CHAT as CHAT,
        CHECKPOINT as CHECKPOINT,
        INDEX as INDEX,
        MAX_TEXT as MAX_TEXT,
        MODULES as MODULES,
        PROCESSOR as PROCESSOR,
        SINGLE as SINGLE,
        TOKENIZER as TOKENIZER,
    )
else:
    from hf_soup._util.lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__)
