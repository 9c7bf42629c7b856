"""What a model makes of text: its files, templates, tokens, grammars, output. Free of torch, for API and engines."""
