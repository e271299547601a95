"""Run by test_two_processes under torchrun: an example on two processes, then a sharded S2FT model."""

import copy
import json
import sys
from pathlib import Path

import finetuning
import text_classification
import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification

from s2ft_diffusion import S2FTConfig, attention_targets

folder, bert, argv = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
held = {}
report = finetuning.report
finetuning.report = lambda trainer, facts: held.update(model=trainer.model) or report(trainer, facts)
text_classification.main(argv)
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
assert dist.get_world_size() == 2
state = {
    name: value for name, value in held["model"].state_dict().items() if "s2ft" in name or "modules_to_save" in name
}
save_file({name: value.contiguous() for name, value in state.items()}, folder / f"rank{rank}.safetensors")

torch.manual_seed(0)
base = AutoModelForSequenceClassification.from_pretrained(bert)
config = S2FTConfig(target_modules=attention_targets(base), n_frequency=60, init_weights=False)
whole = get_peft_model(base, config).eval()
sharded = copy.deepcopy(whole)
for layer in sharded.base_model.model.bert.encoder.layer:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
inputs = {"input_ids": torch.arange(4, 24).view(2, 10), "labels": torch.tensor([0, 1])}
losses = {"whole": [], "sharded": []}
for name, model in (("whole", whole), ("sharded", sharded)):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1000.0)
    for _ in range(3):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[name].append(loss.item())
kept = [p for p in sharded.parameters() if p.requires_grad]
losses["numbers of this rank"] = sum(p.to_local().numel() for p in kept)
losses["numbers"] = sum(p.numel() for p in kept)
(folder / f"losses{rank}.json").write_text(json.dumps(losses))
dist.barrier()
