"""`anyfabric demo kv`: one process runs a prompt, another goes on with it, the KV cache in between.

    text      the stories that the small model is trained on
    train     trains it; the result lies in `model/`
    llm       loads a model, runs prompts in chunks, decodes greedily
    paging    what a page of the KV cache is, and how a cache is laid out in pages
    messages  what the two processes say to each other through `Engine.send`
    prefill   the process that runs prompts
    decode    the process that asks for them and decodes
    baselines the same cache over a bare socket and over gloo
    metrics   what is computed from the time stamps
    processes starting, watching and ending the two processes
    report    what is printed and written
    kv        the command

Only `train`, `llm`, `paging`, `prefill`, `decode` and `baselines` import torch: the command itself
starts quickly and can say what to install when torch is missing (`pip install "anyfabric[demo]"`).
"""
