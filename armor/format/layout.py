"""Where everything lies in a results folder: the one place that spells a path of it.

A method without names gives the path with wildcards, as a rule of the workflow takes it; with names, that of one file.

    results/run.json                                     the run at work, or the last one
    results/{model}/source.json, source/                 where the model is, and the model itself where it was made here
    results/{model}/model.json                           what it is made of
    results/{model}/calibration/{calibration}/           statistics: calibration.json, layer_{layer}.safetensors
    results/{model}/predictions/{evaluation}.json        what the dense model predicts on the text of an evaluation
    results/{model}/predictions/{evaluation}.safetensors its logits, while they are needed
    results/{model}/states/{states}.json, {states}/      the dense model's hidden states, while they are needed
    results/{model}/sensitivity/{sensitivity}.json       how predictions depend on each linear; .safetensors beside it
    results/{model}/benchmark/{benchmark}.json           speed, of the dense model and all recipes in turn
    results/{model}/{recipe}/prices/layer_{layer}.json   of a recipe with a budget: what each choice takes and costs
    results/{model}/{recipe}/budget.json                 what it chose for each linear, which you may edit
    results/{model}/{recipe}/experts/layer_{layer}/      of a large mixture: {experts}.json of a group, like 0-63
    results/{model}/{recipe}/layers/                     factors: layer_{layer}.safetensors, layer_{layer}.json
    results/{model}/{recipe}/refined.json, refined/      the same, refined layer by layer
    results/{model}/{recipe}/tuned.json, tuned/          the same, tuned as a whole
    results/{model}/{recipe}/quantized/                  the same, in few bits
    results/{model}/{recipe}/checkpoint.json             what is known of checkpoint/, which transformers loads
    results/{model}/{recipe}/evaluation/{evaluation}.json
    results/{model}/{recipe}/evaluation/{evaluation}/    of tasks: {task}.json, {task}.samples.jsonl, built tasks
    results/report/                                      the page, its summary, its figures
    results/logs/, results/benchmarks/                   a log and Snakemake's measurements of each job
"""

from __future__ import annotations

from dataclasses import dataclass

from armor.format.names import MODEL, layer_name, logits_beside

__all__ = [
    "CALIBRATION",
    "CHECKPOINT",
    "COMPARISON",
    "FACTORS",
    "FIGURES",
    "PAGE",
    "REPORT",
    "RESERVED",
    "RESULTS",
    "RUN",
    "SOURCE",
    "SUMMARY",
    "Results",
]

RESULTS = "results"
"""The results folder, as it lies in the folder of a run."""
REPORT = "report"
PAGE = "index.html"
FIGURES = "figures"
COMPARISON = "comparison.csv"
RUN = "run.json"
SOURCE = "source.json"
CALIBRATION = "calibration.json"
CHECKPOINT = "checkpoint.json"
SUMMARY = "summary.json"
RESERVED = {
    "models": (REPORT, "logs", "benchmarks"),
    "recipes": ("calibration", "source", "benchmark", "predictions", "sensitivity", "states"),
}
"""Names that models and recipes may not have, for they are folders of the pipeline itself."""
FACTORS = {"factorize": "layers", "refine": "refined", "quantize": "quantized", "tune": "tuned"}
"""The stages that make factors, and the folder of a recipe in which each leaves them."""
REPORT_FILES = (PAGE, "summary.csv", SUMMARY, "summary.md", "summary.tex")


@dataclass(frozen=True)
class Results:
    """The paths of the results folder `root`."""

    root: str = RESULTS

    def run(self) -> str:
        return f"{self.root}/{RUN}"

    def source(self, model: str = "{model}") -> str:
        return f"{self.root}/{model}/{SOURCE}"

    def topology(self, model: str = "{model}") -> str:
        return f"{self.root}/{model}/{MODEL}"

    def calibration(self, model: str = "{model}", calibration: str = "{calibration}") -> str:
        return f"{self.root}/{model}/calibration/{calibration}/{CALIBRATION}"

    def predictions(self, model: str = "{model}", evaluation: str = "{evaluation}") -> str:
        return f"{self.root}/{model}/predictions/{evaluation}.json"

    def logits(self, model: str = "{model}", evaluation: str = "{evaluation}") -> str:
        return str(logits_beside(self.predictions(model, evaluation)))

    def states(self, model: str = "{model}", states: str = "{states}") -> str:
        return f"{self.root}/{model}/states/{states}.json"

    def sensitivity(self, model: str = "{model}", sensitivity: str = "{sensitivity}") -> str:
        return f"{self.root}/{model}/sensitivity/{sensitivity}.json"

    def prices_folder(self, model: str = "{model}", recipe: str = "{recipe}") -> str:
        """The folder with the prices of every decoder layer."""
        return f"{self.root}/{model}/{recipe}/prices"

    def prices(self, model: str = "{model}", recipe: str = "{recipe}", layer: int | str = "{layer}") -> str:
        return f"{self.prices_folder(model, recipe)}/{layer_name(layer)}.json"

    def budget(self, model: str = "{model}", recipe: str = "{recipe}") -> str:
        return f"{self.root}/{model}/{recipe}/budget.json"

    def experts(
        self,
        model: str = "{model}",
        recipe: str = "{recipe}",
        layer: int | str = "{layer}",
        experts: str = "{experts}",
    ) -> str:
        """The record of a group of experts; their factors lie beside it until the layer has them."""
        return f"{self.root}/{model}/{recipe}/experts/{layer_name(layer)}/{experts}.json"

    def layers(self, model: str = "{model}", recipe: str = "{recipe}", stage: str = "factorize") -> str:
        """The folder with the factors of every decoder layer, as `stage` leaves them."""
        return f"{self.root}/{model}/{recipe}/{FACTORS[stage]}"

    def factors(
        self,
        model: str = "{model}",
        recipe: str = "{recipe}",
        layer: int | str = "{layer}",
        stage: str = "factorize",
    ) -> str:
        return f"{self.layers(model, recipe, stage)}/{layer_name(layer)}.safetensors"

    def layer(
        self,
        model: str = "{model}",
        recipe: str = "{recipe}",
        layer: int | str = "{layer}",
        stage: str = "factorize",
    ) -> str:
        return f"{self.layers(model, recipe, stage)}/{layer_name(layer)}.json"

    def refined(self, model: str = "{model}", recipe: str = "{recipe}") -> str:
        return f"{self.layers(model, recipe, 'refine')}.json"

    def tuned(self, model: str = "{model}", recipe: str = "{recipe}") -> str:
        return f"{self.layers(model, recipe, 'tune')}.json"

    def checkpoint(self, model: str = "{model}", recipe: str = "{recipe}") -> str:
        return f"{self.root}/{model}/{recipe}/{CHECKPOINT}"

    def evaluation(self, model: str = "{model}", recipe: str = "{recipe}", evaluation: str = "{evaluation}") -> str:
        return f"{self.root}/{model}/{recipe}/evaluation/{evaluation}.json"

    def benchmark(self, model: str = "{model}", benchmark: str = "{benchmark}") -> str:
        return f"{self.root}/{model}/benchmark/{benchmark}.json"

    def report(self) -> tuple[str, ...]:
        return tuple(f"{self.root}/{REPORT}/{name}" for name in REPORT_FILES)

    def log(self, stage: str, *names: object) -> str:
        """A job's log, by its stage and its names."""
        return "/".join([self.root, "logs", stage, *map(str, names)]).removesuffix("/") + ".log"

    def measured(self, stage: str, *names: object) -> str:
        """What Snakemake measured of a job: seconds and memory."""
        return "/".join([self.root, "benchmarks", stage, *map(str, names)]).removesuffix("/") + ".tsv"
