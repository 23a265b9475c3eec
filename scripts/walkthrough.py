# %% [markdown]
# # A walk through calm
#
# Load a model, decode with early exits, look at where tokens leave, calibrate the threshold,
# plot what it buys. Runs on the model in the box, in a minute or two on two cores. Every `# %%`
# is a cell: open the file in VS Code, Spyder or (with Jupytext) in Jupyter, or run it whole:
#
#     python scripts/walkthrough.py --prompts=60 --figure=runs/tradeoff.svg

# %%
import argparse
import collections
import pathlib
import tempfile

from calm import calibrate, exits, inference
from calm.calibrate import losses as sequence_losses
from calm.calibrate.generations import records
from calm.inference import grid, outputs
from calm.paper import scores

parser = argparse.ArgumentParser(description="A walk through calm on the packed model.")
parser.add_argument("--prompts", type=int, default=60, help="calibration prompts (60)")
parser.add_argument("--tolerance", type=float, default=0.25, help="delta (0.25)")
parser.add_argument("--figure", help="where the plot goes (default: a temporary folder)")
# In a notebook there is no command line of ours.
arguments, _ = parser.parse_known_args()

# %% [markdown]
# ## Load
# A model with its vocabulary and its decoding options. `classifier` is the cheapest measure:
# one dot product a layer says how sure the model is. `one_shape` pads all batches alike: more
# arithmetic, but one compilation a rule, which is what a short session waits for.

# %%
model = grid.one_shape(inference.load("packed", measure="classifier"))
prompts = records.read_prompts(inference.PACKED / "prompts_calibration.jsonl")
prompts = prompts[: arguments.prompts]
unseen = records.read_prompts(inference.PACKED / "prompts_unseen.jsonl")[:8]
print(model)

# %% [markdown]
# ## Decode
# The same prompts at full depth and with a threshold: a token leaves at the first layer whose
# confidence reaches it. The first call compiles; the second is the one to time.

# %%
texts = [prompt.input for prompt in unseen]
full = model.generate(texts, rule=exits.StaticExit())
early = model.generate(texts, threshold=0.9)
print(f"full depth: {full.mean_layers:.2f} layers a token; early: {early.mean_layers:.2f}")

# %% [markdown]
# ## Look at the exits
# In a notebook, `early` alone as the last line of a cell shows all outputs coloured.

# %%
print(outputs.legend_terminal(model.num_layers))
for prompt, whole, output in zip(unseen, full, early, strict=True):
  print(f"\nreference  {prompt.targets[0]}\nfull       {whole.text}")
  print(f"early      {output.coloured()}   ({output.mean_layers:.2f} layers)")

counts = collections.Counter(layer for output in early for layer in output.exit_layers)
for layer in range(1, model.num_layers + 1):
  print(f"layer {layer}: {'#' * counts[layer]} {counts[layer]}")

# %% [markdown]
# ## Calibrate
# Every calibration prompt at every threshold of a grid that was fixed before (each prompt is
# encoded once, the grid compiles once), then the lowest threshold that is certified.

# %%
thresholds = (0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7)
folder = pathlib.Path(tempfile.mkdtemp(prefix="calm-walkthrough-"))
cached = grid.on_grid(model, prompts, thresholds, folder)
losses = sequence_losses.compute(cached, "textual", metric="rouge_l")
result = calibrate.calibrate(losses, tolerance=arguments.tolerance, error_rate=0.05)
print(f"threshold: {result.threshold} ({result.reason})")
print(result.guarantee)

# %% [markdown]
# Serve with it: a model that carries its promise, and refuses one made for other options.

# %%
result.save(folder / "calibration.json")
served = inference.load("packed", calibration=folder / "calibration.json")
print(grid.one_shape(served).generate(texts))

# %% [markdown]
# ## Plot
# Similarity to the full model against layers. `calm report` draws this and much more.

# %%
from matplotlib.figure import Figure  # noqa: E402 (the extra 'report')

references = [prompt.targets for prompt in cached.prompts]
scorer = scores.Scorer(references, "rouge_l")
points = [scorer.scores(records, cached.full) for records in cached.records]
figure = Figure(figsize=(5, 3.5), layout="constrained")
axes = figure.subplots()
axes.plot([p.layers for p in points], [100 * p.similarity for p in points], "o-")
axes.axhline(100 * (1 - arguments.tolerance), linestyle=":", color="grey")
best = max(points, key=lambda p: p.similarity)
least = min(points, key=lambda p: p.layers)
axes.set_title(
  f"{best.layers:.1f} layers a token keep {best.similarity:.0%} of the full model's text,"
  f"\n{least.layers:.1f} keep {least.similarity:.0%}"
)
axes.set_xlabel("mean decoder layers a token")
axes.set_ylabel("ROUGE-L to the full model's text")
path = pathlib.Path(arguments.figure or folder / "tradeoff.svg")
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path)
print(f"written: {path}")
