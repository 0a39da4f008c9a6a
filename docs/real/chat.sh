# What was run on 2026-11-28 for the chat part; MODEL: what real.py makes of the package; FORMATS: the files
export OMP_NUM_THREADS=2
F=FORMATS; O=outputs/assistant
S="--report_to none --mixed_precision bf16 --eval_batch_size 16"
python scripts/train_sft.py --config configs/assistant/sft.yaml --model MODEL --output_dir $O/sft $S --max_prompt_tokens 96 \
  --actor_training_data $F/alpaca_en_demo.json.gz --max_completion_tokens 96 --max_new_tokens 96 --max_dropped_share 0.8 --max_steps 40 --per_device_batch_size 8 --gradient_accumulation_steps 1 --micro_batch_tokens 1024 --eval_steps 20 --eval_rows 16 --test_rows 32 --learning_rate 2e-5 --warmup_steps 5
python scripts/train_reward.py --config configs/assistant/reward.yaml --model $O/sft/final --output_dir $O/reward $S --max_prompt_tokens 192 \
  --reward_training_data $F/dpo_en_demo.json.gz --max_completion_tokens 192 --max_dropped_share 0.95 --max_steps 24 --per_device_batch_size 4 --gradient_accumulation_steps 1 --micro_batch_tokens 1200 --eval_steps 24 --eval_rows 2 --test_rows 24 --learning_rate 3e-5 --warmup_steps 3
python scripts/train_ppo.py --config configs/assistant/ppo.yaml --model $O/sft/final --reward_model $O/reward/final --output_dir $O/ppo $S --max_prompt_tokens 96 \
  --rlhf_training_data $F/alpaca_en_demo.json.gz --max_new_tokens 64 --total_episodes 96 --prompts_per_update 4 --responses_per_prompt 4 --ppo_epochs 1 --advantage rloo --per_device_batch_size 4 --eval_steps 6 --eval_rows 8 --test_rows 16 --learning_rate 5e-6
