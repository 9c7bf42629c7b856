"""Model files, chat templates, tokenizers, grammars and output parsing; shared by the API and engines. No torch."""
