"""One run on several processes and machines, by torch.distributed: the world, its step, its checks. No launcher."""
