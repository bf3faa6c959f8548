"""``python -m hf_soup``, for ``accelerate launch -m hf_soup`` and ``torchrun -m hf_soup``."""

from hf_soup.cli import run

if __name__ == "__main__":
    run()
