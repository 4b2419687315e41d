"""LoRA's own products with dropout inside, as kernels: in bf16, and in fp32."""
