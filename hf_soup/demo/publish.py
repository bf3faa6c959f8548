"""``python -m hf_soup.demo.publish FOLDER``: each folder in it becomes a repo of the Hub that ``HF_ENDPOINT`` names.

A process of its own, because the Hub's client takes endpoint, token and caches from the environment when it is
imported, and in the demo's own process these are the user's.
"""

import logging
import sys
from pathlib import Path

from hf_soup.demo.cache import DATASET, OWNER
from hf_soup.hub import upload_folder

if __name__ == "__main__":
    # In a second demo every repo is there already, and the client would say so eleven times.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for repo in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        upload_folder(f"{OWNER}/{repo.name}", repo, repo_type="dataset" if repo.name == DATASET else "model")
