"""The story of each verb, a file each: check, cook, score, search, verify, update, connectivity."""
