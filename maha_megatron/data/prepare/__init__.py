"""What the command lines of data_prep/ do: corpora, tokenizers and tokenised pairs."""
