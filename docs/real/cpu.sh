# The run on a CPU of 2026-11-28, seed 0, in this order. MODEL, the posts and the rankings are real.py's, with
#   --sft_posts 1200 --reward_posts 216 --judge_posts 216 --held_out_posts 56 --longest_prompt 300
# where SFT and validation have posts of at most 256 tokens. SFT ran at commit ba2b66c. The rest ran at what became
# fe21193 with RANKS = (1, 2, 2, 2, 2): the author's summary is compared with each of the others, and these are not
# compared with each other. VALID: tldr_valid.jsonl.gz.
O=outputs/real
C=configs/smollm2-135m
python scripts/train_sft.py --config $C/sft.yaml --model $MODEL --actor_training_data $O/data/sft.jsonl \
    --actor_validation_data $O/data/validation.jsonl --actor_test_data $VALID --max_steps 150 --eval_steps 50 \
    --save_steps 50 --report_to none --output_dir $O/sft
R="--model $O/sft/final --reward_test_data $O/data/rankings/held_out.jsonl
   --centring_data $O/data/validation.jsonl --max_steps 27 --eval_steps 27 --eval_rows 12 --report_to none"
python scripts/train_reward.py --config $C/reward.yaml $R --reward_training_data $O/data/rankings/reward.jsonl \
    --output_dir $O/reward
python scripts/train_reward.py --config $C/reward.yaml $R --reward_training_data $O/data/rankings/judge.jsonl \
    --seed 1 --output_dir $O/judge
python scripts/train_ppo.py --config $C/ppo.yaml --model $O/sft/final --reward_model $O/reward/final \
    --rlhf_training_data $O/data/prompts.jsonl --rlhf_validation_data $O/data/validation.jsonl \
    --rlhf_test_data $VALID --total_episodes 640 --learning_rate 4e-5 --eval_rows 16 --eval_steps 5 --save_steps 5 \
    --test_rows 8 --report_to none --output_dir $O/ppo
