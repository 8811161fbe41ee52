"""Lower QDQ models, one package for each runtime; `registry` finds them by name."""
