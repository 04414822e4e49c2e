"""Text and token ids: tokenizers read without running anything of theirs, streamed text, chat form, checked prompts."""
