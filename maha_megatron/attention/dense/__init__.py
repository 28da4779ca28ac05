"""Dense causal attention: the peer of MAHA, and the other kind of layer of a hybrid."""
