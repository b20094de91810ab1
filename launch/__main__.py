"""``deepspeed launch RUN.yaml [section.key=value ...]``: Python runs this folder, once per rank."""

import finetune  # beside this file, which Python has put on its path

if __name__ == "__main__":
    finetune.start()
