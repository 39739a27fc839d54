"""Weight files of other programs, read without running what they may hold.

weight_files        safetensors, pickles of PyTorch, folders of Hugging Face; what is checked of tensors
inert_pickle        what a pickle holds beside tensors: stand-ins that do nothing
nanogpt_checkpoint  a checkpoint of nanoGPT, minGPT and what grew out of them
llm_c               a .bin file of llm.c
"""
