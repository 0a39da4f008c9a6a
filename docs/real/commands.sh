# What was run on 2026-11-28, in this order. POSTS: reddit_tldr.jsonl.gz; VALID: tldr_valid.jsonl.gz; MODEL: what
# real.py makes of the package. sft.jsonl, validation.jsonl, prompts.jsonl and the rankings are real.py's, with
# --reward_posts 48 --judge_posts 48 --held_out_posts 24; rankings.jsonl are those of reward and judge together.
S="--max_prompt_tokens 160 --report_to none"
R="--model outputs/real/sft/final --reward_test_data held_out.jsonl --centring_data validation.jsonl"

# stopped with SIGTERM after step 50; the best weights of its checkpoints were saved as outputs/real/sft/final
python scripts/train_sft.py --config configs/smollm2-135m/sft.yaml --model $MODEL \
    --actor_training_data sft.jsonl --actor_validation_data validation.jsonl --actor_test_data $VALID \
    --output_dir outputs/real/sft --report_to none
python scripts/train_reward.py --config configs/smollm2-135m/reward.yaml $R --reward_training_data reward.jsonl \
    --max_steps 6 --eval_steps 6 --eval_rows 2 --test_rows 24 --warmup_steps 1 --learning_rate 5e-5 $S \
    --output_dir outputs/real/reward_46
python scripts/train_reward.py --config configs/smollm2-135m/reward.yaml $R --reward_training_data rankings.jsonl \
    --max_steps 11 --eval_steps 11 --eval_rows 2 --test_rows 24 --warmup_steps 1 --learning_rate 2e-4 $S \
    --output_dir outputs/real/reward
python scripts/train_ppo.py --config configs/smollm2-135m/ppo.yaml --model outputs/real/sft/final \
    --reward_model outputs/real/reward/final --rlhf_training_data prompts.jsonl \
    --rlhf_validation_data validation.jsonl --rlhf_test_data $VALID --total_episodes 120 --prompts_per_update 6 \
    --eval_steps 5 --eval_rows 6 --test_rows 8 --save_steps 5 --learning_rate 3e-5 $S --output_dir outputs/real/ppo
