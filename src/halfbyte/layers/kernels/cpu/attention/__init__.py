"""Attention of whole examples as one kernel, whose scores never leave the cache: in bf16, and in fp32."""
