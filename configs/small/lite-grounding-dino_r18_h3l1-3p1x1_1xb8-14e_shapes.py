# Grounding DINO as small as the demo's detector, on the same shapes; their names are its text.
_base_ = './lite-dino-4scale_r18_h3l1-3p1x1_1xb8-14e_shapes.py'

attention_to_text = dict(embed_dims=256, num_heads=8, dropout=0.0)
model = dict(
    type='LiteGroundingDINO',
    # A name that transformers can fetch, or a folder with a BERT and its tokenizer.
    language_model=dict(
        type='BertModel',
        name='{{$BERT:bert-base-uncased}}',
        pad_to_max=False,
        use_sub_sentence_represent=True,
        special_tokens_list=['[CLS]', '[SEP]', '.', '?'],
        add_pooling_layer=False,
    ),
    encoder=dict(
        text_layer_cfg=dict(
            self_attn_cfg=dict(num_heads=4, embed_dims=256, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=512, ffn_drop=0.0),
        ),
        fusion_layer_cfg=dict(v_dim=256, l_dim=256, embed_dim=256, num_heads=4, init_values=1e-4),
    ),
    decoder=dict(layer_cfg=dict(cross_attn_text_cfg=attention_to_text)),
    bbox_head=dict(
        type='GroundingDINOHead',
        contrastive_cfg=dict(max_text_len=256, log_scale='auto', bias=True),
    ),
    train_cfg=dict(
        assigner=dict(
            match_costs=[
                dict(type='BinaryFocalLossCost', weight=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ]
        )
    ),
)

meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
meta_keys += ('flip', 'flip_direction', 'text', 'custom_entities')
train_pipeline = _base_.train_pipeline
train_pipeline[-1].meta_keys = meta_keys
test_pipeline = _base_.test_pipeline
test_pipeline[-1].meta_keys = meta_keys
train_dataloader = dict(dataset=dict(return_classes=True, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(return_classes=True, pipeline=test_pipeline))
test_dataloader = val_dataloader
