"""What differs between the versions of transformers, PEFT and bitsandbytes: one file each. Imports them when asked."""
