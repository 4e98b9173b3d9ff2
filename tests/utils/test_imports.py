"""The names that other people's scripts import are there with their parameters."""

import importlib
import inspect
import re

import pytest

from utils.files import ROOT

# module -> name -> parameters in YOLOv5 6.1's order; names alone have none, or are no functions
SURFACE = {
    "augmentations": """augment_hsv(im,hgain,sgain,vgain) hist_equalize(im,clahe,bgr) mixup(im,labels,im2,labels2)
        letterbox(im,new_shape,color,auto,scaleFill,scaleup,stride)
        random_perspective(im,targets,segments,degrees,translate,scale,shear,perspective,border)""",
    "autoanchor": """check_anchor_order(m) check_anchors(dataset,model,thr,imgsz)
        kmean_anchors(dataset,n,img_size,thr,gen,verbose)""",
    "autobatch": "check_train_batch_size(model,imgsz) autobatch(model,imgsz,fraction,batch_size)",
    "callbacks": "Callbacks",
    "datasets": """IMG_FORMATS VID_FORMATS exif_size(img) exif_transpose(image) InfiniteDataLoader
        create_dataloader(path,imgsz,batch_size,stride,single_cls,hyp,augment,cache,pad,rect,rank,workers,image_weights,quad,prefix,shuffle)
        LoadImages(path,img_size,stride,auto) LoadScreenshots LoadWebcam(pipe,img_size,stride) letterbox
        LoadStreams(sources,img_size,stride,auto) img2label_paths(img_paths) autosplit(path,weights,annotated_only)
        LoadImagesAndLabels(path,img_size,batch_size,augment,hyp,rect,image_weights,cache_images,single_cls,stride,pad,prefix)""",
    "downloads": "safe_download(file,url,url2,min_bytes,error_msg) attempt_download(file,repo)",
    "general": """LOGGER ROOT DATASETS_DIR cv2 Profile methods(instance) print_args(name,opt) init_seeds(seed)
        intersect_dicts(da,db,exclude) get_latest_run(search_dir) check_requirements(requirements,exclude)
        check_img_size(imgsz,s,floor) check_imshow check_suffix(file,suffix,msg) check_yaml(file,suffix)
        check_file(file,suffix) check_dataset(data,autodownload) download(url,dir,unzip) make_divisible(x,divisor)
        one_cycle(y1,y2,steps) colorstr(input) labels_to_class_weights(labels,nc)
        labels_to_image_weights(labels,nc,class_weights) coco80_to_coco91_class xyxy2xywh(x) xywh2xyxy(x)
        xywhn2xyxy(x,w,h,padw,padh) xyxy2xywhn(x,w,h,clip,eps) scale_coords(img1_shape,coords,img0_shape,ratio_pad)
        clip_coords scale_boxes clip_boxes strip_optimizer(f,s) increment_path(path,exist_ok,sep,mkdir)
        non_max_suppression(prediction,conf_thres,iou_thres,classes,agnostic,multi_label,labels,max_det)""",
    "loss": """smooth_BCE(eps) BCEBlurWithLogitsLoss(alpha) FocalLoss(loss_fcn,gamma,alpha)
        QFocalLoss(loss_fcn,gamma,alpha) ComputeLoss(model,autobalance)""",
    "metrics": """fitness(x) ap_per_class(tp,conf,pred_cls,target_cls,plot,save_dir,names) compute_ap(recall,precision)
        ConfusionMatrix(nc,conf,iou_thres) bbox_iou(box1,box2,x1y1x2y2,GIoU,DIoU,CIoU,eps) box_iou(box1,box2)
        bbox_ioa(box1,box2,eps) wh_iou(wh1,wh2)""",
    "plots": """Colors colors Annotator(im,line_width,font_size,font,pil,example) output_to_target(output)
        feature_visualization(x,module_type,stage,n,save_dir)
        plot_images(images,targets,paths,fname,names,max_size,max_subplots) plot_labels(labels,names,save_dir)
        plot_results(file,dir) plot_val_study(file,dir,x) save_one_box(xyxy,im,file,gain,pad,square,BGR,save)""",
    "torch_utils": """torch_distributed_zero_first(local_rank) select_device(device,batch_size,newline) time_sync
        smart_inference_mode is_parallel(model) de_parallel(model) initialize_weights(model) fuse_conv_and_bn(conv,bn)
        model_info(model,verbose,img_size) copy_attr(a,b,include,exclude) EarlyStopping(patience)
        ModelEMA(model,decay,updates)""",
}
SURFACE["dataloaders"] = SURFACE["datasets"]
MODULES = sorted(SURFACE)


def entries(module):
    """Yields (name, parameters) of a module's surface."""
    for entry in SURFACE[module].split():
        name, _, parameters = entry.rstrip(")").partition("(")
        yield name, [parameter for parameter in parameters.split(",") if parameter]


@pytest.mark.parametrize("module", MODULES)
def test_names_are_there_with_their_parameters(module):
    imported = importlib.import_module(f"utils.{module}")
    for name, wanted in entries(module):
        value = getattr(imported, name)
        if wanted:
            parameters = list(inspect.signature(value).parameters)
            assert parameters[: len(wanted)] == wanted, f"utils.{module}.{name}{tuple(parameters)}"


def test_the_document_lists_what_is_there():
    text = (ROOT / "docs" / "imports.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (`utils\.\w+`(?:, `utils\.\w+`)*) \| (.*) \|$", text, re.M))
    documented = {}
    for modules, names in rows.items():
        documented |= dict.fromkeys(re.findall(r"utils\.(\w+)", modules), set(re.findall(r"`(\w+)`", names)))
    assert documented == {module: {name for name, _ in entries(module)} for module in MODULES}
