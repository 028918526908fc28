"""Curations as config files: `python -m data_curation run --config data_curation/configs/X.py`."""
