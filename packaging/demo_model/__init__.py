"""How the demo model in ``edgekv/demo`` was made: a generated corpus, a tokenizer, two small Llamas."""
