"""What differs between the versions of torch, transformers, PEFT and bitsandbytes: a file each. Imports when asked."""
