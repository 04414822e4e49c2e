"""`lrt-deploy package`: make a folder that runs a bundle elsewhere, by `package_bundle` of the exporters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from . import options, output
from .options import option

TargetName: TypeAlias = Literal["docker", "kserve", "ray", "triton", "web"]


@dataclass(frozen=True)
class PackagingOptions:
    """Options of `package_bundle`, by the same names."""

    precision: Annotated[
        options.PrecisionName | None,
        option(f"Precision to run: {options.listed(options.PrecisionName)}; default: the most precise one.", "NAME"),
    ] = None
    assets: Annotated[Path | None, option("For web: a folder with the npm packages that the page needs.", "DIR")] = None
    force: Annotated[bool, option("Replace an existing package.")] = False


def package(
    bundle: options.BundlePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    *,
    to: Annotated[TargetName, option(f"Where it is to run: {options.listed(TargetName)}.", "NAME")],
    chosen: PackagingOptions,
    json: options.Json = False,
) -> None:
    """Package a bundle for where it is to run, in one folder."""
    from lrt_deploy.exporters.packages.package import package_bundle, summary

    with output.progress(quiet=json) as progress:
        made = package_bundle(
            bundle, out, to, precision=chosen.precision, assets=chosen.assets, force=chosen.force, progress=progress
        )
    found = summary(made)
    fields = {"package": str(out)} | found | {"bundle_sha256": made.bundle_sha256}
    line = f"packaged {out} ({output.bytes_text(found['bytes'])}) for {to}; see its README.md, or run there: {made.run}"
    output.result(json, fields, line)
