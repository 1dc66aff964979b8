"""What stands above and below the flags in the help of the two scripts."""

USAGE = """%(prog)s [--demo | --model_path PATH]
       [--prompt NAME | --prompt_text TEXT | --prompt_file FILE]
       [--origin | --compare | --advise] [option ...]"""
EPILOG = """\
examples:
  python {script} --demo --compare --prompt 4k --seq_len 32 --steps 32
      the bundled demo checkpoint on a 4,096-token document, full attention against SparseD
  python {script} --demo --show --report run.html --prompt short_context
      watch the answer come about, and keep the run as a page for the browser
  python {script} --prompt 16k --warmup 1 --json run.json
      the published checkpoint with SparseD; times and tokens go to run.json
  python {script} --prompt 64k --advise
      how long such a run would take with full attention and with SparseD, from a few steps
  python {script} --origin --prompt_text "What is a prime number?"
      full attention in every step, on a prompt of your own

units: lengths are in tokens, shares are numbers from 0 to 1, all times are seconds

environment:
  HF_HOME            folder of downloaded models (default: ~/.cache/huggingface)
  HF_HUB_OFFLINE     1: use what is downloaded, and no network
  HF_TOKEN           for models whose access is restricted; or log in once with: hf auth login

exit codes:
  0    done
  2    wrong call or input, or an output that cannot be written
  3    out of memory
  130  interrupted (Ctrl-C)
  143  terminated
"""
