"""Read, split, tokenise and batch texts, or decode, resize and batch images."""
