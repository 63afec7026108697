"""Words and lines of the command line of which none is right; ``{run}`` and the like stand for paths."""

from __future__ import annotations

BAD_WORDS = (
    *("nosuchpreset", "steps=0", "steps=-1", "steps=1.5", "steps=nan", "steps=1e999", f"steps={2**70}", "steps=", "=1"),
    *("network=DiT(width=7)", "network=DiT(**{})", "network=DiT(*[1])", "objective.c=(lambda: 1)()", "batch_size=[]"),
    *("network=__import__('os').system('touch {witness}')", "network=open('{witness}','w')", "seed='a'", "steps=1\n2"),
    *('network=exec(\'open("{witness}","w")\')', "data.path.x=1", "__class__=1", "objective.__init__=1", "a.b.c.d=1"),
    *("steps.__class__=1", "network=" + "(" * 3000, "optimizer.betas=(1,2,3)", "--nosuch", "--device=nosuch", "--out="),
    *("--device=cuda:99", "--data=/nowhere/at/all", "--features=nosuch:thing", "--features=/dev/null.pt", "x\x00y"),
    *("--data=\x00", "--data=/dev/null", "--out=/dev/null/x", "--data=" + "x" * 5000, "--features=", "\ud800", "-"),
    *("network=DiT.__init__", "network=[x for x in ()]", "network=DiT()()", "network=f'{1}'", "learning_rate.lr=1j"),
)
BAD_LINES = (
    *("sample {run} --n=0", "sample {run} --n=-1", "sample {run} --n=nan", f"sample {{run}} --n={2**70}", "sample"),
    *("sample {run} --evaluations=0", "sample {run} --evaluations=999999", "sample {run} --label=3"),
    *("sample {run} --guidance=nan", "sample {run} --guidance=2", "sample {run} --average=x", "sample {run} {run}"),
    *("sample {run} --average=PowerFunction(9)", "sample {run} --out={run}", "sample {run} --out=/proc/x.png"),
    *("sample {images}", "evaluate {run} --samples=1", "evaluate {run} --samples=-1", "evaluate {images}", "evaluate"),
    *("evaluate {run} --features=TorchScript(path=1)", "evaluate {run} --average=x --averages", "encode {images}"),
    *(
        "encode {images} --out={out} --shard=0",
        "encode {images} --out={out} --resolution=7",
        "encode {out} --out={out}",
    ),
    *("encode {images} --out={out} --dtype=int8", "encode {images} --out={out} --split=x", "encode {run} --out={out}"),
    *("encode {images} --out={run}/config.json --autoencoder=PixelSpace", "encode {store} --out={out}", "encode"),
    *("encode {images} --out={images} --autoencoder=no/such", "encode {images} --out={out} --autoencoder=os:getcwd"),
    *("ablate --out={out} --steps=0", "ablate --out={out} --arms nosuch", "ablate --out={out} --suites nosuch"),
    *("ablate --out={out} --seconds=-1", "ablate --out={out} --workers=0", "ablate --out={out} --stop-above=1"),
    *(
        "ablate --out={out} steps=5",
        "ablate --out={out} --seconds=nan",
        "help help",
        "train sample",
        "sample /dev/null",
    ),
)
