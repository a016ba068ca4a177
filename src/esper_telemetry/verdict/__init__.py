"""The verdict: whether the model is still alive, where its trouble began, and the way back."""
