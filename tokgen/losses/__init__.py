"""Loss functions of tensors, and the small modules some of them need."""
