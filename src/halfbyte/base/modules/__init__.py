"""Any `nn.Module`, quantised tensor by tensor from its weights: settings, survey, weights, places, fill, offload."""
