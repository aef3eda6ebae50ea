"""Converts weights of Hugging Face, LAVIS and LLaVA to checkpoints of this package, and back.

A tower is one network of a model: vision, Q-Former or language model. Each tower has one table of
rules (source tensor -> our parameter); one engine applies them and reports all that is left over.

    families.py         a row for each Hugging Face architecture: sections of config.json, tables
    config_keys.py      rows for keys of config.json, used for reading and writing
    sections.py         the rows of each tower's section of config.json
    llama_sections.py   those of LLaMA and its relatives
    hf_config.py        config.json -> the sizes of the model (`Variant`), checked
    hf_folder.py        a Hugging Face folder -> our parameters, one at a time
    input_formats.py    the input format of a model whose folder has no record of it
    language_folder.py  a Hugging Face folder of a language model alone -> our parameters
    lavis.py            LAVIS's names for the tensors of the tables
    original.py         `.pth` files of LAVIS -> our parameters, one at a time
    clip_folder.py      a folder of CLIP -> the image tower of LLaVA
    vision_folder.py    the same tower -> our parameters, without a language model
    llava_config.py     the config.json of original LLaVA, read and written
    llava_names.py      original LLaVA's names for the tensors of the tables
    llava_sources.py    original LLaVA: whole folders, deltas with their base, projectors
    llava_original.py   one of these and CLIP's folder -> our parameters, one at a time
    token_rows.py       tensors with added rows, and deltas added to their base
    tokenizer_settings.py  special tokens that a LLaVA tokenizer does not name
    convert.py          weights of any origin -> a checkpoint folder of this package
    positions.py        the positions of the vision tower, resized for images of another size
    stored_model.py     a checkpoint, or a base with tuned weights, ready to be written
    export.py           a checkpoint of this package -> a Hugging Face folder
    llava_export.py     a checkpoint of LLaVA -> a folder or projector of the original
    assembly.py         the rules run backward: our parameters -> tensors of another layout
    layouts.py          the names of the layouts to export to
    engine.py           the kinds of rules, and the plan made from them
    transforms.py       transposes and reshapes of weights, each with its inverse
    safetensors.py      reads and writes safetensors files, one tensor at a time
    torch_files.py      reads (without running code in them) and writes `.pth` and `.bin` files
    weight_files.py     the weights of a folder, in either kind of files
    tables/             one table a tower: vision qformer t5 llama opt heads
"""
