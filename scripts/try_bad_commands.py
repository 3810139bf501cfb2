"""Try 100 command lines with a mistake: each is answered by one line, before anything is written."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tries import QUICK, call, files_of, inside, report, trained

ROWS = [f"u{user},i{(user * 3 + t) % 11},{t}" for user in range(30) for t in range(5)]

TRAIN = """
seed=-1|seed=4294967296|seed=1.5|seed=x|seed=null|test=middle|monitor_mode=up|validations=x
trainer.accumulate_grad_batches=0|trainer.strategy=nope|trainer.precision=3|trainer.precision=bf17
trainer.max_stepss=3|trainer.max_steps=x|trainer.accelerator=tpuu|trainer.limit_val_batches=-1
trainer.val_check_interval=5000 trainer.check_val_every_n_epoch=1|trainer.gradient_clip_val=x
trainer.gradient_clip_algorithm=x|trainer.log_every_n_steps=x|trainer.nope=1|trainer=nope
metrics=[hr@100000000]|metrics=hr|metrics=hr@x|metrics=hr@0|metrics=[]|metrics=x@1|metrics=[10]|metrics=hr@-1
metrics=[hr@10|metrics={a:1}|name=../x|name=a/b|name=|sweep=../x|dataset.name=../x
dataset.n_test_users=0|dataset.n_test_users=x|dataset.n_users=1|dataset.seed=x|dataset=nope|dataset.batch_size=0
dataset.num_workers=-1|dataset.eval_batch_size=0|backbone=nope|backbone.d_model=x|backbone.d_modell=1
backbone.d_model=0|backbone.n_layers=x|backbone._target_=os.system|backbone._target_=nowhere.X
backbone._target_=x|head=nope|head.x=1|loss=nope|loss.x=1|optimizer=nope|optimizer.lr=x|optimizer.x=1
optimizer.lr=-1|optimizer._target_=torch.nn.Linear|scheduler=nope|scheduler.x=1|callbacks=nope
callbacks.checkpoint.x=1|callbacks.checkpoint.dirpath=/proc/x|callbacks.progress._target_=x
logger=nope|ckpt_path=absent.ckpt|ckpt_path=last|ckpt_path=.|output_root=/proc/x|output_root=taken
import=nowhere|import=absent.py|import=broken.py|x=1|=1|seed|task=nope|task=next_item|tokenizer.x=1
launcher=nope|debug=nope|experiment=nope|seed=0,1
dataset=interactions|dataset=interactions dataset.interactions=absent.csv|dataset=table
dataset=interactions dataset.interactions=.|dataset=interactions dataset.interactions=taken
dataset=interactions dataset.interactions=my.csv dataset.user=x
dataset=interactions dataset.interactions=my.csv dataset.names=[0,1]
dataset=interactions dataset.interactions=my.csv dataset.separator=ab
dataset=interactions dataset.interactions=my.csv dataset.k_core=100
dataset=interactions dataset.interactions=my.csv dataset.split=x
dataset=interactions dataset.interactions=my.csv trainer.val_check_interval=5000
"""

OTHERS = """
evaluate|evaluate run=nowhere|evaluate run=last|evaluate run=RUN checkpoint=x|evaluate run=RUN metrics=x@1
evaluate run=RUN metrics=hr@100000000|evaluate run=RUN dataset.n_test_users=33|evaluate run=RUN dataset.seed=7
evaluate run=RUN dataset.x=1|evaluate run=RUN x=1|evaluate run=RUN output_dir=taken|evaluate run=RUN accelerator=x
evaluate run=taken|evaluate run=RUN dataset=interactions
recommend|recommend run=nowhere|recommend run=RUN k=0|recommend run=RUN k=x|recommend run=RUN users=absent.csv
recommend run=RUN users=my.csv|recommend run=RUN output=x.xlsx|recommend run=RUN output=runs
recommend run=RUN accelerator=x|recommend run=RUN filter_seen=x|recommend run=RUN users=my.csv filter_seen=true
report|report nowhere|report sweep=[|search search.n_trials=x|search search.n_trials=-1|search search.space=x
"""


def commands() -> list[list[str]]:
    """Return the command lines, as words."""
    train = [
        ["train", *each.split()] for line in TRAIN.split("\n") for each in line.split("|") if each
    ]
    others = [each.split() for line in OTHERS.split("\n") for each in line.split("|") if each]
    return [*train, *others]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try every n-th command line")
    every = parser.parse_args().every
    faults: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        run = trained(Path(temporary) / "good")
        folder = Path(temporary) / "tries"
        chosen = commands()[::every]
        for number, (command, *arguments) in enumerate(chosen):
            shutil.rmtree(folder, ignore_errors=True)
            with inside(folder):
                (folder / "taken").write_text("")
                (folder / "broken.py").write_text("1 / 0\n")
                (folder / "my.csv").write_text(
                    "\n".join(["user_id,item_id,timestamp", *ROWS]) + "\n"
                )
                before = files_of(folder)
                words = [each.replace("RUN", str(run)) for each in arguments]
                # The small run's options first, so that the mistake wins; they are of its dataset alone.
                given = QUICK if command == "train" and "dataset=" not in " ".join(words) else ()
                given = (
                    given
                    if command == "train" and given
                    else QUICK[-4:]
                    if command == "train"
                    else ()
                )
                kept = {word.partition("=")[0] for word in words}
                given = tuple(each for each in given if each.partition("=")[0] not in kept)
                answer = call(command, *given, *words)
                fault = answer.fault()
                if written := {
                    name for name in files_of(folder) - before if not name.endswith(".log")
                }:
                    fault = fault or f"wrote {sorted(written)[:3]}"
            if fault:
                faults[f"{number} {command} {' '.join(arguments)}"] = fault
    return report(faults, len(chosen))


if __name__ == "__main__":
    sys.exit(main())
