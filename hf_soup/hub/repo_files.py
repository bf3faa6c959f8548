"""Files of a model's repo by name: weights, tokenizers, processors, checkpoints of a run."""

from __future__ import annotations

import re

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: What a tokenizer is made of, by every name that transformers gives such files; a second one has a folder.
TOKENIZER = re.compile(
    r"(\w+_tokenizer/)?((tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|vocab-src|vocab-tgt"
    r"|target_vocab|entity_vocab|word_shape|word_pronunciation|normalizer|emoji|emoji_map|byte_maps|tekken)\.json"
    r"|(vocab|merges|dict)\.txt|bpe\.codes|[\w.-]+\.(model|spm|tiktoken|tokenizer))"
)
PROCESSOR = re.compile(
    r"(preprocessor|processor|image_processor|video_preprocessor|feature_extractor|audio_tokenizer)_config\.json"
)
CHAT = re.compile(r"chat_template\.(json|jinja)|additional_chat_templates/[\w.-]+\.jinja")
#: What makes embeddings of what a transformer gives, by sentence-transformers' names.
MODULES = re.compile(
    r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json|\d+_[A-Z]\w*/\w*config\.json"
)
#: What a model needs beside its weights, by name. Everything else in a repo stays out of the soup.
ASSETS = re.compile(
    rf"{TOKENIZER.pattern}|{PROCESSOR.pattern}|{CHAT.pattern}|{MODULES.pattern}|(config|generation_config)\.json"
)


#: The folders that a Trainer writes during a run.
CHECKPOINT = re.compile("checkpoint-([0-9]{1,18})")

#: Bytes of a config or a card; the names of 20,000 labels, twice, are 2 MB.
MAX_TEXT = 1 << 22
