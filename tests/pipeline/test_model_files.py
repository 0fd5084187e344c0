"""What is known of a model's folder before anything loads."""

import subprocess
import sys

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefcache.pipeline import model_files


def test_the_model_types_are_those_of_transformers():
    assert model_files.causal_model_types() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_model_that_names_code_of_its_own_is_checked_without_importing_transformers():
    code = (
        "import sys; from prefcache.pipeline.model_files import causal_model_types; "
        "print('llama' in causal_model_types(), 'unheard_of' in causal_model_types(), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False False\n"
