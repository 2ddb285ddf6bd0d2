"""Metadata of the package that depends on where it is built: https://hatch.pypa.io/latest/plugins/metadata-hook/custom/"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAPER = "https://arxiv.org/abs/2103.02886"
RELATIVE = r"\]\((?![a-z]+:|#)"


class Metadata(MetadataHookInterface):
    """
    README and URLs. A release is built where ``GITHUB_REPOSITORY`` (owner/name) is set: there the README's relative links and
    images, which PyPI cannot follow, lead to the files of the release's tag.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        readme = (root / "README.md").read_text(encoding="utf-8")
        urls = {"Paper": PAPER}
        if repository := os.environ.get("GITHUB_REPOSITORY"):
            source = (root / "sb3_seer/__init__.py").read_text(encoding="utf-8")
            tag = "v" + re.findall(r'^__version__ = "(.*)"', source, re.MULTILINE)[0]
            readme = re.sub(rf"(!\[[^]]*){RELATIVE}", rf"\1](https://raw.githubusercontent.com/{repository}/{tag}/", readme)
            readme = re.sub(RELATIVE, f"](https://github.com/{repository}/blob/{tag}/", readme)
            home = f"https://github.com/{repository}"
            urls |= {
                "Source": home,
                "Documentation": f"{home}/blob/{tag}/docs/index.md",
                "Changelog": f"{home}/blob/{tag}/CHANGELOG.md",
                "Issues": f"{home}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
        metadata["urls"] = urls
