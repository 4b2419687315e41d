"""Any `nn.Module`, quantised tensor by tensor from its weights: settings, sites, weights, places, fill, offload."""
