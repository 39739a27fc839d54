"""Models of other programs come in, artifacts go out to other programs.

    jaxgpt-export import-hf       a Hugging Face GPT-2 folder -> a float32 artifact
    jaxgpt-export import-nanogpt  a checkpoint of nanoGPT, minGPT, llm.c -> a float32 artifact
    jaxgpt-export gguf            a float32 artifact -> one file for llama.cpp
    jaxgpt-export onnx            a float32 artifact -> a folder for ONNX Runtime
    jaxgpt-export program         an artifact -> one torch.export program

What comes in is compared with an independent reading of the same file, what goes out is read back.
"""
