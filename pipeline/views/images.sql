-- The pictures of the prompts, one row each: size, format, bytes as they came, how many tokens stand for it, how many examples have it, and the tag that stands for it in a prompt's text. Column `images` of examples and pairs lists the ids. The bytes themselves are not here; one_of_several marks a picture that the model's processor treats differently because it shares its prompt with others.
with uses as (
    select image, count(distinct example_id) as n_examples
    from (select unnest(images) as image, example_id from stored.prepared)
    group by image
)

select
    lower(hex(image)) as image,
    lower(hex(pixels)) as pixels,
    format('[image {}x{} {}]', width, height, lower(hex(pixels))[:12]) as tag,
    width,
    height,
    format,
    bytes,
    one_of_several,
    n_tokens,
    coalesce(n_examples, 0) as n_examples
from stored.images left join uses using (image)
