"""What a model will do on a card, from the header of its file: nothing is built, and torch is not needed."""
