"""mteb's folder of results, written atomically.

mteb writes results in place. This cache writes them elsewhere and then moves each file
to its place. The result itself comes last: if it is there, the other files are, too.
"""

import os
import pathlib
import shutil
import tempfile
from typing import Any

from gecko_jax.io import writing


def build_cache(mteb: Any, folder: str | os.PathLike) -> Any:
    """Returns an `mteb.ResultCache` of the folder that writes whole files."""

    class WholeResults(mteb.ResultCache):
        def save_to_cache(
            self, task_result: Any, model_name: Any, *arguments: Any, **settings: Any
        ) -> None:
            def path_in(cache: Any) -> pathlib.Path:
                name = task_result.task_name
                return cache.get_task_result_path(name, model_name, *arguments)

            with tempfile.TemporaryDirectory() as scratch:
                staged = mteb.ResultCache(scratch)
                source, target = path_in(staged), path_in(self)
                # mteb appends the facts about each task to this file.
                if (runs := target.with_name("run_settings.jsonl")).exists():
                    source.parent.mkdir(parents=True)
                    shutil.copy(runs, source.parent)
                staged.save_to_cache(task_result, model_name, *arguments, **settings)
                others = [path for path in source.parent.iterdir() if path != source]
                for path in (*others, source):
                    with writing.write_file(target.with_name(path.name)) as temporary:
                        shutil.copy(path, temporary)

    return WholeResults(folder)
