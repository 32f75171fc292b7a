"""Where a prompt enters a model: embeddings, keys and values, states between layers."""
