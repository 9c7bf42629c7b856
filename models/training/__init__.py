"""Corpus, tokenizer, training and evaluation of celeriac-mini: everything that made its weights."""
